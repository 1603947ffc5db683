"""Networks for small images, written so that hooks, ``torch.func`` and double backward work.

Every activation and normalisation is a module of its own with ``inplace=False``; parameter
names are those of the public checkpoints that each file cites.
"""
