"""By which way weights travel to the engines."""

from __future__ import annotations

from tandem.engine.config.schema import Config


def transport(config: Config) -> str:
    """nccl, ipc, shm or gloo: what `sync.transport` asks for, or what fits the devices.

    A backend of the user's own takes tensors from a CPU channel, wherever it computes.
    """
    if config.sync.transport != "auto":
        return config.sync.transport
    cluster = config.cluster
    on_gpus = cluster.engine_gpus > 0 and cluster.learner_gpus > 0
    own_backend = ":" in config.rollout.backend
    if on_gpus and not own_backend:
        return "ipc" if cluster.colocate else "nccl"
    return "shm" if cluster.address is None else "gloo"
