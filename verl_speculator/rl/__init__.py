"""Reinforcement learning with verl: rollouts that draft with the policy's speculator."""
