"""Faults put into running jobs, at every kind of instruction: does every rank end, and is nothing lost?"""
