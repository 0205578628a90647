# SPDX-License-Identifier: Apache-2.0
"""Files, locks, processes and run manifests: helpers that know neither images nor networks."""
