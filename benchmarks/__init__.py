"""Measurements; results/ holds their tables with the machine they were made on."""
