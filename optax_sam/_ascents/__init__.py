"""The methods: one paper, one file, named as the paper is known.

In each file stand first the alias, around a base optimizer; then the link, the paper's
own transformation of the gradient; its state; and its helpers. Papers do not import
one another, but for SAM, whose link scales what the others make to the radius.
"""
