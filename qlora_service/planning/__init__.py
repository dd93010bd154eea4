"""Prediction of a job's memory and duration."""
