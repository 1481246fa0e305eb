"""The dashboard: `dashboard(queue, authorize=…)` is an ASGI application to mount or to serve."""

from sqlqueue.dashboard.access import Access as Access
from sqlqueue.dashboard.access import basic as basic
from sqlqueue.dashboard.access import bearer as bearer
from sqlqueue.dashboard.access import trusted_header as trusted_header
from sqlqueue.dashboard.app import dashboard as dashboard
