"""What every reader has: settings, checked when they are made, and the stream that they describe."""

from dataclasses import dataclass, field
from typing import ClassVar

from metaopt.data.images import ImageSet
from metaopt.data.stream import Stream
from metaopt.errors import ConfigError


@dataclass
class Reader:
    """Settings of a source of data: a subclass adds its own, and says in ``_domains`` what they describe.

    Attributes:
        name: how configurations call it.
        required: a setting without which there is no stream, and why.
        has_clean_images: whether it brings clean unlabeled images of its own, for `clean_images`.
        keeps_class_mirrored: whether a mirrored image is still of its class, as a digit is not.
        corruptions: names in the registry of shifts, or of files; what None means is up to the subclass.
        severities: each in (0, 5]; every corruption comes at each of them.
        limit: images of each corruption; None: all.
        passes: times that the whole stream is met.

    Raises:
        ConfigError: a value is out of range.
    """

    name: ClassVar[str]
    required: ClassVar[tuple[str, str] | None] = None
    has_clean_images: ClassVar[bool] = False
    keeps_class_mirrored: ClassVar[bool] = True

    corruptions: list[str] | None = None
    severities: list[float] = field(default_factory=lambda: [5.0])
    limit: int | None = None
    passes: int = 1

    def __post_init__(self) -> None:
        """Check the range of each value."""
        for key, value in (("limit", self.limit), ("passes", self.passes)):
            if value is not None and value < 1:
                raise ConfigError(
                    f"data.{key}={value} is out of range; allowed are values of at least 1: set data.{key}=1"
                )
        if not self.severities:
            raise ConfigError("data.severities=[] is empty; allowed are values in (0, 5]: set data.severities=[5]")
        for severity in self.severities:
            if not 0 < severity <= 5:
                raise ConfigError(
                    f"data.severities has {severity}; allowed are values in (0, 5]: set for example data.severities=[5]"
                )

    def check_stream(self) -> None:
        """Raise `ConfigError` where what a stream is read from is not set, before anything is read."""
        if self.required is not None and getattr(self, self.required[0]) is None:
            key, why = self.required
            raise ConfigError(f"data.{key} is not set; data={self.name} {why}: set data.{key}=PATH")

    def stream(self, seed: int = 0) -> Stream:
        """The domains, over again where they are met more than once; images are made or read when a domain is met.

        Args:
            seed: of what the corruptions draw.

        Raises:
            ConfigError: as of `check_stream`.
            DataError: a file or a corruption is missing or of no use.
        """
        self.check_stream()
        return [*self._domains(seed)] * self.passes

    def clean_images(self) -> ImageSet:
        """Clean unlabeled images of the source domain.

        Raises:
            ConfigError: it has none.
        """
        raise ConfigError(
            f"source.images is not set; data={self.name} has no clean unlabeled images of its own: set "
            "source.images=PATH to a .npy file of (N, H, W, 3) uint8 images"
        )

    def _domains(self, seed: int) -> Stream:
        """The stream met once."""
        raise NotImplementedError
