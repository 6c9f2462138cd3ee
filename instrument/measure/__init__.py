"""A tensor becomes a sketch: its values are counted on the device where they lie; no step or name is known here."""
