"""Evaluators: functions of (eval step, parameters, batches) that give a dictionary of floats."""
