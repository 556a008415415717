"""Methods that differ from SAM in how they descend: one paper, one file.

In each file stand first the alias, around a base optimizer; then the link, which comes
first in the base and reads the clean gradient beside the perturbed one; its state; and
its helpers. All ascend as SAM does; what else ascends goes with their links. That of
Functional SAM is no link but a loss.
"""
