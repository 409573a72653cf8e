"""Token merging (ToMe, arXiv 2210.09461): faster Vision Transformers by merging similar tokens.

    import tome

    tome.patch.timm(model)
    model.r = 8

See ``tome.ops`` for the operations, ``tome.schedule`` for what ``r`` may be, ``tome.set_backend`` for who computes.
"""

from tome import merge, ops, patch, schedule, utils, vis
from tome.backend import BackendError, get_backend, set_backend, use_backend
from tome.ops import unmerge
from tome.patch import Tokens, UnsupportedModelError, merged, unpatch

__all__ = [
    "BackendError",
    "Tokens",
    "UnsupportedModelError",
    "get_backend",
    "merge",
    "merged",
    "ops",
    "patch",
    "schedule",
    "set_backend",
    "unmerge",
    "unpatch",
    "use_backend",
    "utils",
    "vis",
]
