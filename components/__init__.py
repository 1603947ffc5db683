"""Steps of the pipeline: one folder per step, and the runtime that speaks to the outside."""
