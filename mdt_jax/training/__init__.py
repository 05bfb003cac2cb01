"""A training run: its step, state, checks, log and judgements."""
