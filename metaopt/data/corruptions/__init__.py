"""Corruptions: batched functions ``f(images, severity, generator)`` on float images in [0, 1].

The fifteen of CIFAR-10-C in their usual order, its held-out four, and a few more outside both.
"""

from metaopt.data.corruptions.blur import defocus_blur as defocus_blur
from metaopt.data.corruptions.blur import gaussian_blur as gaussian_blur
from metaopt.data.corruptions.blur import glass_blur as glass_blur
from metaopt.data.corruptions.blur import motion_blur as motion_blur
from metaopt.data.corruptions.blur import zoom_blur as zoom_blur
from metaopt.data.corruptions.colour import brightness as brightness
from metaopt.data.corruptions.colour import contrast as contrast
from metaopt.data.corruptions.colour import saturate as saturate
from metaopt.data.corruptions.digital import elastic_transform as elastic_transform
from metaopt.data.corruptions.digital import jpeg_compression as jpeg_compression
from metaopt.data.corruptions.digital import pixelate as pixelate
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
from metaopt.data.corruptions.texture import coloured_noise as coloured_noise
from metaopt.data.corruptions.texture import random_convolution as random_convolution
from metaopt.data.corruptions.weather import fog as fog
from metaopt.data.corruptions.weather import frost as frost
from metaopt.data.corruptions.weather import snow as snow

TEST_CORRUPTIONS = (
    gaussian_noise,
    shot_noise,
    impulse_noise,
    defocus_blur,
    glass_blur,
    motion_blur,
    zoom_blur,
    snow,
    frost,
    fog,
    brightness,
    contrast,
    elastic_transform,
    pixelate,
    jpeg_compression,
)
META_CORRUPTIONS = (speckle_noise, gaussian_blur, spatter, saturate)
