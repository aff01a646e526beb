"""Pure functions on tensors. Each fast path stands beside a `*_ref` that defines it."""
