"""Prune-OPD on a cluster: `make launch`, `dryrun`, `status`, `logs`, `cancel`.

    clusters/*.yaml ─ cluster.py ─▶ Cluster ─ executors.py ─▶ NeMo-Run executor ─┐
    recipe, overrides, sweep ─ jobs.py ─▶ Jobs ─ experiment.py ─▶ Experiment ◀───┘
    on each node: python -m prune_opd.ranks.node (check, torchrun, signals)

It runs in an environment of its own (`make setup-launch`) without torch, which is enough for a login node.
"""
