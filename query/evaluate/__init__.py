"""Counterfactual evaluation: do scores predict what training without some samples does?"""
