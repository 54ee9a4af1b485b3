"""One file per hardware vendor; each asks its own tools and never raises."""
