"""Spatter: drops of water (severities 1 to 3) or mud (4 and 5) on the lens.

Constants and the chain of filters are the published ones. A smoothed random layer is cut at a threshold; what stays is
liquid. Water is lit: the distance from the drops' edges (J. Canny, "A Computational Approach to Edge Detection", PAMI
1986) is equalised and embossed, and added in pale turquoise; the distance is exact here, within 2 % of the published
chamfer distance. Between severities 3 and 4 falls the liquid of the nearer one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.data.corruptions.filters import correlate, drawing_size, enlarge, gaussian
from metaopt.data.corruptions.severity import constants, normal, truncate, unit

# Mean and standard deviation of the layer, its smoothing, the threshold, the light of the water or the smoothing of the
# mud, and whether it is mud.
SPATTER = (
    (0.62, 0.0, 0.7, 0.7, 0.0, 0),
    (0.62, 0.1, 0.7, 0.7, 0.5, 0),
    (0.65, 0.1, 0.8, 0.7, 0.5, 0),
    (0.65, 0.3, 1, 0.69, 0.5, 0),
    (0.65, 0.1, 0.7, 0.69, 0.6, 1),
    (0.65, 0.1, 0.5, 0.68, 0.6, 1),
)
TURQUOISE = torch.tensor([175, 238, 238]).double().view(3, 1, 1) / 255
BROWN = torch.tensor([63, 42, 20]).double().view(3, 1, 1) / 255
EMBOSS = torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]])
BOX = torch.full((3, 3), 1 / 9, dtype=torch.float64)
WEAK_EDGE, STRONG_EDGE = 50, 150  # Canny's thresholds on the gradient, |dx| + |dy|
FARTHEST = 20  # pixels; the distance from an edge is cut here
MUD_LEAST = 0.8  # thinner mud is not seen


def spatter(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Splash water or mud on the images."""
    mean, spread, smoothing, threshold, last, mud = constants(SPATTER, severity)
    values = unit(images)
    layer = mean + spread * normal((values.shape[0], 1, *drawing_size(images)), values, generator)
    layer = gaussian(layer, smoothing)
    liquid = torch.where(layer < threshold, torch.zeros_like(layer), layer)
    if mud > 0.5:
        cover = gaussian((liquid > threshold).to(values.dtype), last)
        cover = enlarge(torch.where(cover < MUD_LEAST, torch.zeros_like(cover), cover), images)
        return truncate(values * (1 - cover) + BROWN.to(values) * cover, images)
    return truncate(values + last * enlarge(_water(liquid), images) * TURQUOISE.to(values), images)


def _water(liquid: Tensor) -> Tensor:
    """Light on the drops of a layer (B, 1, H, W), 1 where it is brightest; no drops give no light."""
    drops = (liquid * 255).clamp(0, 255).floor()
    # Whole numbers this small are exact in float32, whose convolutions are the fast ones.
    distance = correlate(_distance(canny(drops.float())), BOX, "mirror").floor()
    relief = correlate(_equalise(distance), EMBOSS, "mirror").clamp(0, 255)
    light = drops * correlate(relief, BOX, "mirror").round()
    peak = light.amax(dim=(2, 3), keepdim=True)
    return torch.where(peak > 0, light / peak.clamp_min(1), torch.zeros_like(light))


def canny(layer: Tensor) -> Tensor:
    """Edges of (B, 1, H, W) on the scale of 0 to 255, as a Boolean of the same shape."""
    smooth, step = torch.tensor([1.0, 2, 1]), torch.tensor([-1.0, 0, 1])
    across = correlate(layer, torch.outer(smooth, step), "nearest")
    along = correlate(layer, torch.outer(step, smooth), "nearest")
    size = across.abs() + along.abs()
    outside = F.pad(size, (1, 1, 1, 1))

    def neighbour(down: int, right: int) -> Tensor:
        return outside[..., 1 + down : outside.shape[-2] - 1 + down, 1 + right : outside.shape[-1] - 1 + right]

    # An edge pixel tops its neighbours along the gradient, whose direction is told in four sectors of 45 degrees.
    flat = along.abs() < across.abs() * 0.41421356
    steep = along.abs() > across.abs() * 2.41421356
    level = (size > neighbour(0, -1)) & (size >= neighbour(0, 1))
    upright = (size > neighbour(-1, 0)) & (size >= neighbour(1, 0))
    falling = (size > neighbour(-1, -1)) & (size > neighbour(1, 1))
    rising = (size > neighbour(-1, 1)) & (size > neighbour(1, -1))
    slanted = torch.where(across * along < 0, rising, falling)
    thin = torch.where(flat, level, torch.where(steep, upright, slanted)) & (size > WEAK_EDGE)
    edges = thin & (size > STRONG_EDGE)
    while True:  # weak edges count where a chain of them leads to a strong one
        grown = _dilate(edges) & thin
        if torch.equal(grown, edges):
            return edges
        edges = grown


def _dilate(edges: Tensor) -> Tensor:
    """Each true pixel of (B, 1, H, W) and its eight neighbours."""
    wide = F.pad(edges, (1, 1, 1, 1))
    tall = wide[..., :-2, :] | wide[..., 1:-1, :] | wide[..., 2:, :]
    return tall[..., :-2] | tall[..., 1:-1] | tall[..., 2:]


def _distance(edges: Tensor) -> Tensor:
    """Euclidean distance of each pixel of (B, 1, H, W) from the nearest edge, cut at ``FARTHEST`` pixels.

    Along the rows first, where a long way is made of doubled ones; then, of squares, along the columns.
    """
    across = FARTHEST * (~edges).to(torch.get_default_dtype())
    reach = 1
    while reach <= FARTHEST:
        nearer = across.clone()
        _lower(nearer[..., reach:], across[..., :-reach] + reach)
        _lower(nearer[..., :-reach], across[..., reach:] + reach)
        across, reach = nearer, 2 * reach
    squared = across.square()
    distance, step = squared.clone(), 1
    while step**2 < distance.amax():  # no pixel further off can be the nearest
        _lower(distance[..., step:, :], squared[..., :-step, :] + step**2)
        _lower(distance[..., :-step, :], squared[..., step:, :] + step**2)
        step += 1
    return distance.sqrt()


def _lower(values: Tensor, bound: Tensor) -> None:
    """Lower the values to the bound, in place."""
    torch.minimum(values, bound, out=values)


def _equalise(layer: Tensor) -> Tensor:
    """Spread the whole values 0 to 255 of each image (B, 1, H, W) so that their histogram is flat."""
    flat = layer.flatten(1).long()
    counts = torch.zeros(flat.shape[0], 256, dtype=layer.dtype, device=layer.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=layer.dtype))
    lowest = counts.gather(1, flat.amin(1, keepdim=True))
    rest = flat.shape[1] - lowest
    table = ((counts.cumsum(1) - lowest) * 255 / rest.clamp_min(1)).round().clamp(0, 255)
    spread = table.gather(1, flat).view_as(layer)
    return torch.where((rest > 0)[:, :, None, None], spread, layer)
