# SPDX-License-Identifier: Apache-2.0
"""Run a network on a volume as the bundle's evaluator does: engines, the inferer, a profile of the stages."""
