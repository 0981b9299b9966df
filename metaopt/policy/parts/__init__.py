"""Parts of a policy, one concept a file; `metaopt.registry.PARTS` names them."""
