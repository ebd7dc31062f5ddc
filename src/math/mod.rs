//! Losses, their gradients with respect to log-probs, metrics and schedules. Pure functions on numbers.
