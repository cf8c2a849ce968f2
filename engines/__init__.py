"""Plans from bundles: targets, the builder, its gate, and the store (docs/design.md, "Engines and their store")."""
