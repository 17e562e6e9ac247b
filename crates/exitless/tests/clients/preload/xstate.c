/*
 * A ptrace() for User-Mode Linux on processors with more extended state than its buffer holds (AMX alone has 8 KiB).
 *
 * The kernel gives as much of the register set NT_X86_XSTATE as is asked for, and takes it only whole. Where User-Mode
 * Linux sets less than that, the bytes it has are laid over the state that the process has now. What lies beyond them
 * stays as it is.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Of <sys/ptrace.h>, which declares the function that this file defines. */
enum { PEEKTEXT = 1, PEEKUSER = 3, GETREGSET = 0x4204, SETREGSET = 0x4205 };

/* All state that is defined today takes 11 KiB. */
static __thread char state[64 << 10];

static long set_xstate(long pid, const struct iovec *part)
{
	struct iovec whole = { state, sizeof(state) };
	size_t bytes = part->iov_len;

	if (syscall(SYS_ptrace, GETREGSET, pid, NT_X86_XSTATE, &whole) != 0)
		return -1;
	if (bytes > whole.iov_len)
		bytes = whole.iov_len;
	memcpy(state, part->iov_base, bytes);
	return syscall(SYS_ptrace, SETREGSET, pid, NT_X86_XSTATE, &whole);
}

long ptrace(int request, ...)
{
	va_list arguments;
	long pid, address, data, word;

	va_start(arguments, request);
	pid = va_arg(arguments, int);
	address = va_arg(arguments, long);
	data = va_arg(arguments, long);
	va_end(arguments);

	if (request == SETREGSET && address == NT_X86_XSTATE)
		return set_xstate(pid, (const struct iovec *)data);
	if (request < PEEKTEXT || request > PEEKUSER)
		return syscall(SYS_ptrace, (long)request, pid, address, data);
	/* The kernel stores a word that was read, the C library's function returns it. */
	if (syscall(SYS_ptrace, (long)request, pid, address, &word) != 0)
		return -1;
	errno = 0;
	return word;
}
