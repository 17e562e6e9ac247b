/*
 * A tracer with a buffer that is too small for the extended state, as that of User-Mode Linux is on some processors.
 * Ends with 0 if it changes a register of the process that it traces by that buffer, and nothing else changes.
 */
#include <elf.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* In an XSAVE area (Intel SDM volume 1, 13.4): XMM0, and a size that ends among the upper halves of YMM0 to YMM15. */
enum { XMM0 = 160, SMALL = 512 + 64 + 128, LARGE = 64 << 10 };

static char small[SMALL], before[LARGE], after[LARGE];

static int failed(const char *what)
{
	printf("%s failed, errno = %d\n", what, errno);
	return 1;
}

static int change(int pid)
{
	struct iovec part = { small, SMALL }, old = { before, LARGE }, new = { after, LARGE };

	if (ptrace(PTRACE_GETREGSET, pid, NT_X86_XSTATE, &old) || ptrace(PTRACE_GETREGSET, pid, NT_X86_XSTATE, &part))
		return failed("get");
	small[XMM0] ^= 0x55;
	before[XMM0] ^= 0x55;
	if (ptrace(PTRACE_SETREGSET, pid, NT_X86_XSTATE, &part))
		return failed("set");
	if (ptrace(PTRACE_GETREGSET, pid, NT_X86_XSTATE, &new))
		return failed("get again");
	if (new.iov_len != old.iov_len || memcmp(before, after, old.iov_len))
		return failed("compare");
	errno = 0;
	if (ptrace(PTRACE_PEEKTEXT, pid, &change, 0) != *(long *)&change || errno)
		return failed("peek");
	return 0;
}

int main(void)
{
	int pid = fork(), status, result;

	if (pid == 0) {
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		raise(SIGSTOP);
		_exit(7);
	}
	if (waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status))
		return failed("trace");
	result = change(pid);
	ptrace(PTRACE_CONT, pid, 0, 0);
	if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status) || WEXITSTATUS(status) != 7)
		return failed("go on");
	return result;
}
