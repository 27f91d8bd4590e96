"""The public names of serving."""

from __future__ import annotations

import pytest

from sgmv import serving
from sgmv.serving import AdapterSlots, Scheduler


@pytest.mark.once
def test_public_names_have_contracts() -> None:
    """One line, `Semantics:`, an example; a source, where somebody else defined the thing."""
    ours = {
        "Counters",
        "Failure",
        "Outcome",
        "ReplicasOutcome",
        "fewest_replicas",
        "Trace",
        "Scheduler.admit",
    }
    public = {name: getattr(serving, name) for name in serving.__all__ if name != "POLICIES"}
    for owner in (AdapterSlots, Scheduler, serving.Step):
        for name, value in vars(owner).items():
            if not name.startswith("_") and callable(value):
                public[f"{owner.__name__}.{name}"] = value
    for name, value in public.items():
        doc = value.__doc__ or ""
        assert doc.splitlines()[0].strip(), name
        assert ">>>" in doc, f"{name} has no example"
        assert "Semantics:" in doc, f"{name} has no Semantics"
        assert name in ours or "Source:" in doc, f"{name} has no source"
