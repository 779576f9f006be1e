"""Parameter allocation search: any models, a budget of parameters, and one bank that makes their weights.

:func:`plan` turns models and a budget into a :class:`Plan`, :func:`apply` binds copies of the models to one bank as it
says; after some training :func:`split` and :func:`unshare` refine the plan where gradients disagree
(SuperWeight Networks, arXiv 2312.01280).

The rest are pure functions over shapes, numbers and gradients that decide what the published code decides, but for the
last:

- :mod:`.clusters`: layers into clusters by depth, and the levels of a cluster, from its smallest layer to its largest.
- :mod:`.templates`: how many templates a budget buys for every level, and the window of them that each layer combines.
- :mod:`.coefficients`: which layers start with the same coefficients.
- :mod:`.priority`: the queue that puts things together by similarity; the next three use it.
- :mod:`.splitting`, :mod:`.joining`: clusters split where gradients disagree; further networks join them.
- :mod:`.unsharing`: layers get coefficients of their own where the gradients of shared ones disagree.
- :mod:`.stable`: not published: clusters split alike in any order of their layers; :mod:`.partition` finds how.

===================  ==========================  ==========================================================
here                 in the published code       meaning
===================  ==========================  ==========================================================
cluster              group                       layers of one kernel size that share templates
level                width                       what a larger layer of a cluster adds to the next smaller one
bank                 ParameterBank, group_width  the templates of one level of one cluster, one after another
template             candidate                   numbers of the size of one level's piece of a weight
window               layer_param_block           the templates of a bank that one layer combines
vector, coefficient  ParameterCombiner           the factors of a window's templates; layers may share them
===================  ==========================  ==========================================================

Some rules depend on the order of layers or let a part of a budget or bank lie idle. They are kept, because published
networks and results were made with them, and each is marked "as published" where it is.
"""

from .applying import BoundModels, apply, plain
from .planning import plan
from .plans import Plan, PlannedLayer
from .refining import split, unshare

__all__ = ["BoundModels", "Plan", "PlannedLayer", "apply", "plain", "plan", "split", "unshare"]
