"""Mixing: experts in, one mixture of experts out; pure and offline."""
