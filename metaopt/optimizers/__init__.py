"""Update rules: the meta gradient generator with its gradient memory layer, and the hand-made rules it replaces."""
