"""Where blocks live: planned from a budget, then loaded, released or streamed behind one iterator."""
