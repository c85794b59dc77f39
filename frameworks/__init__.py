"""Palladion in other frameworks: functions that put quantized weights and decode attention into their modules."""
