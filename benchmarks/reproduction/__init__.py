"""The paper's comparisons at the demo's scale: what aligning, tuning and rewriting reach, and cost."""
