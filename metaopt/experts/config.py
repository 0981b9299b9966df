"""Settings of the experts, with every choice in which MoASE's paper and its released code differ."""

from dataclasses import dataclass

from metaopt.errors import ConfigError, check_one_of

EXPERT_COUNTS = (2, 4, 8, 16)
CHOICES: dict[str, tuple[str, ...]] = {
    "activation": ("relu", "gelu", "identity"),
    "rank_by": ("value", "magnitude"),
    "scope": ("token", "sample"),
    "dropout": ("hard", "soft", "straight_through"),
    "dag_reads": ("low", "high", "all"),
    "dag_level": ("token", "sample"),
    "asg_level": ("token", "sample", "batch"),
    "reads": ("mlp_input", "residual"),
}


@dataclass(frozen=True)
class ExpertsConfig:
    """Mixture of activation sparsity experts (MoASE: arXiv 2405.16486; AAAI 2026), one mixture for each site.

    The defaults are those of the paper. Where the released code (RoyZry98/MoASE-Pytorch) does otherwise, it says so.

    Attributes:
        experts: E, the number of experts of a mixture; the first ``low_share`` of them keep low activations.
        top_k: how many experts the gates choose for a token; None: all of them (released: 4 of 4).
        bottleneck: width between the two layers of an expert; None: a quarter of the site's (released: 192 of 768).
        low_share: share of the experts that are domain-specific, keeping the smallest activations; E times it is whole.
        bases: shares of activations kept, repeated over each kind's experts; empty: i/(2m) for the i-th of m experts of
            a kind (paper, after equation 2), so 1/4, 1/2 for E = 4.
        scale: factor of the experts' sum.
        activation: between the two layers. After "relu" the smallest activations are mostly zeros, so that the
            published domain-specific experts see little but their bias; "gelu" ranked by "magnitude" keeps them alive.
        rank_by: whether SDD ranks activations by their value (published) or by their magnitude.
        scope: what SDD counts over: the features of one "token" (released), or all features of all tokens of a "sample"
            (paper, equation 2).
        sdd: spatial differentiable dropout; off, experts and gates see all activations.
        dag: domain-aware gate; off, all experts weigh the same.
        asg: activation sparsity gate; off, each expert keeps its base share.
        dropout: SDD's mask, see :mod:`metaopt.experts.dropout`: "hard" to deploy, the others to meta-train.
        temperature: of the soft mask, in units of the activations.
        dag_reads: which half of the features DAG routes from: "low" (paper, equation 3) or "high" (released).
        dag_share: the share of features that DAG routes from.
        dag_level: whether DAG weighs the experts per token (published) or per sample, from the tokens' mean.
        asg_level: what ASG's thresholds are averaged over: the whole "batch" (published), a "sample", or nothing
            ("token"). In batches, an image's prediction depends on its neighbours.
        asg_range: η, the most that ASG adds to a base share.
        reads: what the experts see beside an MLP: its own input, after the norm layer ("mlp_input"), or the input of
            that norm layer, the block's residual stream ("residual", released).

    Raises:
        ConfigError: a value is out of range, or does not go with another.
    """

    experts: int = 4
    top_k: int | None = None
    bottleneck: int | None = None
    low_share: float = 0.5
    bases: tuple[float, ...] = ()
    scale: float = 0.8
    activation: str = "relu"
    rank_by: str = "value"
    scope: str = "token"
    sdd: bool = True
    dag: bool = True
    asg: bool = True
    dropout: str = "hard"
    temperature: float = 0.1
    dag_reads: str = "low"
    dag_share: float = 0.5
    dag_level: str = "token"
    asg_level: str = "batch"
    asg_range: float = 0.1
    reads: str = "mlp_input"

    def __post_init__(self) -> None:
        """Check every value against its range."""
        check_one_of("experts.experts", self.experts, EXPERT_COUNTS)
        for name, allowed in CHOICES.items():
            check_one_of(f"experts.{name}", getattr(self, name), allowed)
        for name, value, most in (("top_k", self.top_k, self.experts), ("bottleneck", self.bottleneck, None)):
            if value is not None and (value != int(value) or value < 1 or (most is not None and value > most)):
                limit = "of at least 1" if most is None else f"from 1 to experts={most}"
                raise ConfigError(f"experts.{name} is {value}; allowed are whole numbers {limit}: leave it unset, say")
        if not (0 <= self.low_share <= 1 and (self.low_share * self.experts).is_integer()):
            raise ConfigError(
                f"experts.low_share is {self.low_share}; allowed are whole parts of experts={self.experts}, from 0 to "
                "1: set 0.5"
            )
        for name in ("temperature", "scale"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"experts.{name} is {getattr(self, name)}; it must be positive and finite: set 0.1")
        if not 0 < self.dag_share <= 1:
            raise ConfigError(f"experts.dag_share is {self.dag_share}; allowed are shares in (0, 1]: set 0.5")
        if not 0 <= self.asg_range < 1:
            raise ConfigError(f"experts.asg_range is {self.asg_range}; allowed are values in [0, 1): set 0.1")
        self._check_shares()

    def _check_shares(self) -> None:
        most = 1 - (self.asg_range if self.asg else 0)
        for base in self.bases:
            if not (isinstance(base, int | float) and 0 < base <= most + 1e-9):
                raise ConfigError(
                    f"experts.bases has {base}; allowed are shares in (0, {most:g}], for ASG may add asg_range: set "
                    "for example (0.25, 0.5)"
                )
        if self.scope == "sample" and self.asg and self.asg_level == "token":
            raise ConfigError(
                "experts.asg_level is 'token' and scope is 'sample'; a sample has one threshold for all its tokens: "
                "set asg_level to 'sample', or scope to 'token'"
            )

    @property
    def low_experts(self) -> int:
        """How many experts are domain-specific: the first ones."""
        return round(self.low_share * self.experts)

    @property
    def base_shares(self) -> tuple[float, ...]:
        """Share of activations that each expert keeps before ASG, (E,)."""
        shares: list[float] = []
        for count in (self.low_experts, self.experts - self.low_experts):
            bases = self.bases or tuple(i / (2 * count) for i in range(1, count + 1))
            shares += [bases[i % len(bases)] for i in range(count)]
        return tuple(shares)
