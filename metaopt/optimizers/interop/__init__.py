"""The update rules in other ecosystems: ``torch.optim``, torchopt and higher. All give the same parameters."""
