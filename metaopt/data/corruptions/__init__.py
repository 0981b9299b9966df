"""Corruptions: batched functions ``f(images, severity, generator)`` on float images in [0, 1]."""

from metaopt.data.corruptions.blur import gaussian_blur as gaussian_blur
from metaopt.data.corruptions.colour import brightness as brightness
from metaopt.data.corruptions.colour import contrast as contrast
from metaopt.data.corruptions.colour import saturate as saturate
from metaopt.data.corruptions.noise import gaussian_noise as gaussian_noise
from metaopt.data.corruptions.noise import impulse_noise as impulse_noise
from metaopt.data.corruptions.noise import shot_noise as shot_noise
from metaopt.data.corruptions.noise import speckle_noise as speckle_noise
from metaopt.data.corruptions.procedural import channel_gain as channel_gain
from metaopt.data.corruptions.procedural import gamma as gamma
from metaopt.data.corruptions.procedural import hue as hue
from metaopt.data.corruptions.procedural import occlusion as occlusion
from metaopt.data.corruptions.procedural import posterise as posterise
from metaopt.data.corruptions.spatter import spatter as spatter

META_CORRUPTIONS = (speckle_noise, gaussian_blur, spatter, saturate)
TEST_CORRUPTIONS = (gaussian_noise, shot_noise, impulse_noise, brightness, contrast)
