"""Counterfactual evaluation: do scores predict the effect of training without some of the samples?"""
