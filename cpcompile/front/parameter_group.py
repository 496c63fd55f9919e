"""Parameter group: the ranks in which parameters and their gradients travel, apart from the messages of attention on GPUs."""

from __future__ import annotations

import logging
import weakref

import torch.distributed as dist

from cpcompile import _torch
from cpcompile.options.mesh import Axis

_log = logging.getLogger(__name__)
# By group and not by name: names begin anew when a process joins other ranks later.
_TWINS: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup | None] = weakref.WeakKeyDictionary()


def parameter_group(group: dist.ProcessGroup, axis: Axis) -> dist.ProcessGroup:
    """Return the group that parameters of `group` travel in, for all models the same. Collective when it is first asked for.

    On GPUs it is not one that attention uses, whose messages they would wait for.
    """
    if str(group.group_name) not in axis.groups or axis.device_type != "cuda":
        return group
    if group not in _TWINS:
        _TWINS[group] = twin = _torch.twin_group(group)
        if twin is None:
            _log.warning(
                "Parameters or gradients travel in the process group of the context-parallel axis, so that they and attention "
                "wait for each other: the ranks belong to different numbers of process groups, and torch cannot make another "
                "one for them alone."
            )
    return _TWINS[group] or group
