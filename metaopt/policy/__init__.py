"""The adaptation policy: the learned whole, its one step, its state and its file."""

from metaopt.policy.adapts import layout_of as layout_of
from metaopt.policy.balance import ClassBalance as ClassBalance
from metaopt.policy.checkpoint import SourceRecord as SourceRecord
from metaopt.policy.checkpoint import check_source as check_source
from metaopt.policy.checkpoint import load_policy as load_policy
from metaopt.policy.checkpoint import policy_from_dict as policy_from_dict
from metaopt.policy.checkpoint import policy_to_dict as policy_to_dict
from metaopt.policy.checkpoint import save_policy as save_policy
from metaopt.policy.initialization import LearnedInitialization as LearnedInitialization
from metaopt.policy.methods import MethodConfig as MethodConfig
from metaopt.policy.methods import build_method as build_method
from metaopt.policy.methods import new_policy as new_policy
from metaopt.policy.policy import AdaptationPolicy as AdaptationPolicy
from metaopt.policy.prior import FixedPrior as FixedPrior
from metaopt.policy.prior import LearnedPrior as LearnedPrior
from metaopt.policy.prior import learned_prior as learned_prior
from metaopt.policy.restoration import RestorationConfig as RestorationConfig
from metaopt.policy.restoration import SourceRestoration as SourceRestoration
from metaopt.policy.state import PolicyState as PolicyState
from metaopt.policy.transfer import transferred as transferred
