"""What hostile functions do in a worker."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time

SLEEP = [sys.executable, "-c", "import time; time.sleep(1000)"]


def start_child(task):
    """Leaves a process, or says what hindered it."""
    how = task["how"]
    try:
        if how == "popen":
            return subprocess.Popen(SLEEP, stdout=-3, stderr=-3, stdin=-3).pid
        if how == "session":
            return subprocess.Popen(SLEEP, stdout=-3, stderr=-3, stdin=-3, start_new_session=True).pid
        if how == "anonymous":
            mark = "RLHF_JAX_WORKER=" + os.environ["RLHF_JAX_WORKER"]
            return subprocess.Popen([*SLEEP, mark], stdout=-3, stderr=-3, start_new_session=True, env={}).pid
        if how == "thread":
            threads = [threading.Thread(target=time.sleep, args=(0,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return "threads"
        if how == "exec":
            os.execv(sys.executable, SLEEP)
        pid = os.fork()
        if pid == 0:
            if how == "double" and os.fork():
                os._exit(0)
            os.setsid()
            time.sleep(1000)
            os._exit(0)
        if how == "double":
            os.waitpid(pid, 0)
        return pid
    except OSError as error:
        return type(error).__name__
    finally:
        if task.get("hang"):
            time.sleep(1000)


def forge(task):
    """Writes into every file that is open, as if a reply came from there."""
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, task["text"].encode())
        except OSError:
            continue
    if task.get("hang"):
        time.sleep(1000)
    return "honest"


def answer_later(task):
    """Leaves a thread that watches the next task."""
    if task:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    return "honest"


def write_file(task):
    """Writes a file of so many bytes."""
    with open(task["path"], "wb") as file:
        for _ in range(task["megabytes"]):
            file.write(bytes(1 << 20))
    return os.path.getsize(task["path"])


def burn(task):
    """Lifts the limit on processor time as far as it goes, and uses all of it."""
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if task.get("lift"):
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
    return hard


def environment(task):
    """What a variable holds."""
    return {name: os.environ.get(name) for name in task}
