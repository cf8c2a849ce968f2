"""Plans from bundles. Not built yet: bundles already hold graph files with TensorRT's bodies (docs/design.md)."""
