"""MoASE's experts beside a frozen network: dropout by activation, gates, attachment, teacher, and what they cost."""

from metaopt.experts.adapter import Experts, attach_experts, detach_experts, expert_layout, get_experts, with_experts
from metaopt.experts.config import ExpertsConfig
from metaopt.experts.cost import ExpertCosts, expert_costs
from metaopt.experts.learned import LearnedExperts, LearnedExpertsConfig
from metaopt.experts.mixture import ExpertMixture
from metaopt.experts.sites import Site, SitePredicate, mlp_sites, stage_sites
from metaopt.experts.teacher import (
    TeacherConfig,
    TeacherState,
    init_teacher,
    proximal_loss,
    restore,
    select_anchor,
    teacher_logits,
    update_teacher,
)
from metaopt.experts.usage import ExpertUsage
