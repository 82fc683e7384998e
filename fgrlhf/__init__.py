"""Token-level RLHF from minimal edits. README.md has the reading order."""

import os

# OpenMP's threads spin while they wait for one another. When another program needs the same cores,
# two-thread training then takes ten times as long. This must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
