# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation: a student learns from frozen teachers. Start with ``distiller`` and ``loss``."""
