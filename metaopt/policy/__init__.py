"""The adaptation policy: the learned whole, its parts, its one step, its state and its file."""

from metaopt.policy.method import MethodConfig as MethodConfig
from metaopt.policy.method import build_method as build_method
from metaopt.policy.policy import AdaptationPolicy as AdaptationPolicy
from metaopt.policy.source_record import SourceRecord as SourceRecord
from metaopt.policy.transfer import transferred as transferred
from metaopt.policy.untrained import new_policy as new_policy
