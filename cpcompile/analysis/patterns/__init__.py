"""The forms in which a model may say attention, found in its graph."""
