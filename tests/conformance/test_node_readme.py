"""Every code block of the README of the Node library, version 1.0.0, by its heading and first line, and its counterpart here.

The counterparts are tests: code as its user would write it, run on a real MongoDB.

| heading | the block begins with | counterpart |
|---|---|---|
| Architecture | the diagram of the layers | test_node_readme_workflows.py::test_each_part_of_the_layer_diagram |
| Architecture | `draft → running → waiting ↔ running → done` | test_node_readme_workflows.py::test_the_state_machine |
| Installation | `npm install @classytic/streamline mongoose` | test_node_readme_workflows.py::test_what_is_installed_and_imported |
| Quick Start | `import mongoose from 'mongoose';` | test_node_readme_workflows.py::test_quick_start |
| 1. Wait for Human Input | `const approval = createWorkflow('approval-flow'` | test_node_readme_workflows.py::test_wait_for_human_input |
| 2. Sleep/Timers | `const workflow = createWorkflow('delayed-task', {` | test_node_readme_workflows.py::test_sleep |
| 3. Parallel Execution | `import { createWorkflow, executeParallel }` | test_node_readme_workflows.py::test_parallel_execution |
| 4. Conditional Steps | `const workflow = createWorkflow('conditional-flow', {` | test_node_readme_workflows.py::test_conditional_steps |
| 5. Wait for Completion | `const workflow = createWorkflow('data-pipeline', {` | test_node_readme_workflows.py::test_wait_for_completion |
| 6. Long-Running Steps (Heartbeat) | `const workflow = createWorkflow('large` | test_node_readme_workflows.py::test_long_running_steps |
| Add Custom Indexes | `import { WorkflowRunModel }` | test_node_readme_operations.py::test_add_custom_indexes |
| Query Workflows | `// Get all scraper runs` | test_node_readme_operations.py::test_query_workflows |
| Example: Track Multiple Scraper Runs | `// scraper-service.ts` | test_node_readme_operations.py::test_track_multiple_scraper_runs |
| UI Example (React) | `// ScraperDashboard.tsx` | test_node_readme_operations.py::test_ui_example |
| Option 1: TTL Index (Auto-Cleanup) | `// app.ts - On startup` | test_node_readme_operations.py::test_ttl_index |
| Option 2: Manual Cleanup | `// cleanup-service.ts` | test_node_readme_operations.py::test_manual_cleanup |
| Option 3: Workflow-Specific Expiry | `// Store expiry in context` | test_node_readme_operations.py::test_workflow_specific_expiry |
| Helper: Index Setup Function | `// db-setup.ts` | test_node_readme_operations.py::test_index_setup_function |
| Webhooks & External Resume | `import { createHook, resumeHook }` | test_node_readme_operations.py::test_webhooks |
| Monitoring & Observability | `import { globalEventBus }` | test_node_readme_operations.py::test_monitoring |
| Error Handling | `import { ErrorCode, WorkflowNotFoundError }` | test_node_readme_operations.py::test_error_handling |
| WorkflowRunModel (Mongoose) | `import { WorkflowRunModel }` | test_node_readme_operations.py::test_workflow_run_model |
| Testing | `npm test # Run all tests` | test_node_readme_operations.py::test_how_tests_are_run |
| Advanced: Dependency Injection | `import { WorkflowEngine` | test_node_readme_operations.py::test_dependency_injection |

What the README lists outside of its blocks:

| heading | list | counterpart |
|---|---|---|
| Option 2: Manual Cleanup | the cron job | test_node_readme_operations.py::test_cleanup_from_cron |
| Workflow (from createWorkflow) | nine methods | test_node_readme_workflows.py::test_every_method_of_a_workflow |
| StepContext (in handlers) | nine members | test_node_readme_workflows.py::test_every_member_of_the_step_context |
| Error Handling | seven codes | test_node_readme_operations.py::test_every_error_code_of_the_table |
| Examples | seven programs | test_node_readme.py::test_each_example_program_has_a_counterpart |
"""

from __future__ import annotations

import re

import pytest

from support import REPOSITORY

BLOCKS = 24  # code blocks of that README, of every language
FOLDER = REPOSITORY / "tests" / "conformance"
ROW = re.compile(r"^\| (?P<heading>[^|]+) \| (?P<begins>[^|]+) \| (?P<file>test_node_readme\w*\.py)::(?P<test>test_\w+) \|$", re.MULTILINE)

EXAMPLES = {
    "hello-world.ts": "hello_world.py",
    "wait-workflow.ts": "wait_and_resume.py",
    "sleep-workflow.ts": "sleep.py",
    "parallel-workflow.ts": "parallel.py",
    "conditional-workflow.ts": "conditional.py",
    "newsletter-automation.ts": "newsletter.py",
    "ai-pipeline.ts": "ai_pipeline.py",
}
"""The programs that the README names, and those of examples/, which tests/conformance/test_examples.py runs."""


def test_every_block_has_a_counterpart_that_runs() -> None:
    """A block without one is a promise to users of the Node library that was not tried."""
    assert __doc__ is not None
    blocks, _, lists = __doc__.partition("What the README lists outside of its blocks:")
    rows = ROW.findall(blocks)
    assert len({row[:2] for row in rows}) == len({row[2:] for row in rows}) == len(rows) == BLOCKS
    named = {(file, test) for _, _, file, test in [*rows, *ROW.findall(lists)]}
    files = FOLDER.glob("test_node_readme*.py")
    defined = {(path.name, test) for path in files for test in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)}
    assert named <= defined
    assert defined - named == {("test_node_readme.py", "test_every_block_has_a_counterpart_that_runs")}, "a counterpart of nothing"


@pytest.mark.parametrize(("theirs", "ours"), EXAMPLES.items(), ids=EXAMPLES)
def test_each_example_program_has_a_counterpart(theirs: str, ours: str) -> None:
    assert f'"{ours.removesuffix(".py")}": (' in (FOLDER / "test_examples.py").read_text(), theirs
