"""The two small convex programs behind every method here, solved exactly: nonnegative (dual cone) and simplex."""
