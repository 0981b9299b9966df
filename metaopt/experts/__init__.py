"""MoASE's experts beside a frozen network: dropout by activation, gates, attachment, teacher, and what they cost."""

from metaopt.experts.adapter import Experts as Experts
from metaopt.experts.adapter import attach_experts as attach_experts
from metaopt.experts.adapter import detach_experts as detach_experts
from metaopt.experts.adapter import expert_layout as expert_layout
from metaopt.experts.adapter import get_experts as get_experts
from metaopt.experts.adapter import with_experts as with_experts
from metaopt.experts.config import ExpertsConfig as ExpertsConfig
from metaopt.experts.cost import ExpertCosts as ExpertCosts
from metaopt.experts.cost import expert_costs as expert_costs
from metaopt.experts.dropout import spatial_dropout as spatial_dropout
from metaopt.experts.gates import ActivationSparsityGate as ActivationSparsityGate
from metaopt.experts.gates import DomainAwareGate as DomainAwareGate
from metaopt.experts.mixture import ExpertMixture as ExpertMixture
from metaopt.experts.sites import Site as Site
from metaopt.experts.sites import SitePredicate as SitePredicate
from metaopt.experts.sites import mlp_sites as mlp_sites
from metaopt.experts.sites import stage_sites as stage_sites
from metaopt.experts.usage import ExpertUsage as ExpertUsage
