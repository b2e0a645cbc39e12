"""Windows: the functions of the system that Python has not, and how they report errors."""

from __future__ import annotations

import ctypes
import msvcrt
import os
from ctypes import wintypes
from typing import Any

_kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
_advapi32 = ctypes.WinDLL("advapi32", use_last_error=True)
# Without releasing the interpreter lock: for what never waits.
_quick = ctypes.PyDLL("kernel32", use_last_error=True)

GENERIC_READ, GENERIC_WRITE = 0x80000000, 0x40000000
SHARE_ALL, SHARE_NONE = 7, 0
CREATE_NEW, OPEN_EXISTING, OPEN_ALWAYS = 1, 3, 4
# Kept from the disk as long as memory lasts, not searched, and opened itself if it is a link.
_FLAGS = 0x00000100 | 0x00002000 | 0x00200000
DRIVE_REMOTE = 4

ACCESS_DENIED, SHARING_VIOLATION, LOCK_VIOLATION = 5, 32, 33
DIRECTORY_NOT_EMPTY, MORE_DATA, USER_MAPPED_FILE, ALREADY_EXISTS = 145, 234, 1224, 183
NOT_FOUND = (2, 3)

_SET_SPARSE, _QUERY_ALLOCATED_RANGES = 0x000900C4, 0x000940CF
_END_OF_FILE_INFO, _STANDARD_INFO = 6, 1
_LOCK_EXCLUSIVE_NOW = 3
_LOCK_OFFSET = 1 << 62  # Windows' locks forbid reading, too: far behind all bytes


class _Overlapped(ctypes.Structure):
    _fields_ = (
        ("internal", ctypes.c_size_t),
        ("internal_high", ctypes.c_size_t),
        ("offset", ctypes.c_uint64),
        ("event", wintypes.HANDLE),
    )


class _Span(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_int64), ("nbytes", ctypes.c_int64))


class _StandardInfo(ctypes.Structure):
    _fields_ = (
        ("allocated", ctypes.c_int64),
        ("end", ctypes.c_int64),
        ("links", wintypes.DWORD),
        ("removed", wintypes.BYTE),
        ("folder", wintypes.BYTE),
    )


class _Region(ctypes.Structure):
    """MEMORY_BASIC_INFORMATION of 64-bit Windows."""

    _fields_ = (
        ("address", ctypes.c_size_t),
        ("allocation", ctypes.c_size_t),
        ("allocation_protection", wintypes.DWORD),
        ("partition", wintypes.DWORD),
        ("nbytes", ctypes.c_size_t),
        ("state", wintypes.DWORD),
        ("protection", wintypes.DWORD),
        ("kind", wintypes.DWORD),
    )


class _SecurityAttributes(ctypes.Structure):
    _fields_ = (
        ("nbytes", wintypes.DWORD),
        ("descriptor", ctypes.c_void_p),
        ("inherit", wintypes.BOOL),
    )


def _function(library: Any, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


_H, _P, _D, _B, _W = (
    *(wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD, wintypes.BOOL, wintypes.LPCWSTR),
)
_CreateFile = _function(_kernel32, "CreateFileW", _H, _W, _D, _D, _P, _D, _D, _H)
_CloseHandle = _function(_kernel32, "CloseHandle", _B, _H)
_CreateDirectory = _function(_kernel32, "CreateDirectoryW", _B, _W, _P)
_CreateMutex = _function(_kernel32, "CreateMutexW", _H, _P, _B, _W)
_DeviceIoControl = _function(_kernel32, "DeviceIoControl", _B, _H, _D, _P, _D, _P, _D, _P, _P)
_GetDriveType = _function(_kernel32, "GetDriveTypeW", wintypes.UINT, _W)
_GetFileInformation = _function(_kernel32, "GetFileInformationByHandleEx", _B, _H, _D, _P, _D)
_LocalFree = _function(_kernel32, "LocalFree", _P, _P)
_QueryWorkingSet = _function(_kernel32, "K32QueryWorkingSetEx", _B, _H, _P, _D)
_ReadFile = _function(_kernel32, "ReadFile", _B, _H, _P, _D, _P, _P)
_ReleaseMutex = _function(_kernel32, "ReleaseMutex", _B, _H)
_SetFileInformation = _function(_kernel32, "SetFileInformationByHandle", _B, _H, _D, _P, _D)
_VirtualQuery = _function(_kernel32, "VirtualQuery", ctypes.c_size_t, _P, _P, ctypes.c_size_t)
_VirtualUnlock = _function(_kernel32, "VirtualUnlock", _B, _P, ctypes.c_size_t)
_Wait = _function(_kernel32, "WaitForSingleObject", _D, _H, _D)
_WriteFile = _function(_kernel32, "WriteFile", _B, _H, _P, _D, _P, _P)
_LockFile = _function(_quick, "LockFileEx", _B, _H, _D, _D, _D, _D, _P)
_UnlockFile = _function(_quick, "UnlockFileEx", _B, _H, _D, _D, _D, _P)
_descriptor_of = _function(
    _advapi32, "ConvertStringSecurityDescriptorToSecurityDescriptorW", _B, _W, _D, _P, _P
)
_text_of_user = _function(_advapi32, "ConvertSidToStringSidW", _B, _P, _P)
_GetNamedSecurity = _function(
    _advapi32, "GetNamedSecurityInfoW", _D, _W, _D, _D, _P, _P, _P, _P, _P
)
_GetTokenInformation = _function(_advapi32, "GetTokenInformation", _B, _H, _D, _P, _D, _P)
_OpenProcessToken = _function(_advapi32, "OpenProcessToken", _B, _H, _D, _P)
_THIS_PROCESS = _H(-1)


def _failure() -> OSError:
    return ctypes.WinError(ctypes.get_last_error())


def _handle(fd: int) -> Any:
    return _H(msvcrt.get_osfhandle(fd))


# ---------------------------------------------------------------------------------- files


def open_file(path: str, access: int, share: int, disposition: int) -> int:
    """Open a file; return a descriptor that no child inherits.

    Raises
    ------
    OSError
        With ``winerror``.
    """
    handle = _CreateFile(path, access, share, None, disposition, _FLAGS, None)
    if handle == _H(-1).value:
        raise _failure()
    try:
        return msvcrt.open_osfhandle(handle, os.O_RDWR | os.O_BINARY | os.O_NOINHERIT)
    except BaseException:
        _CloseHandle(handle)
        raise


def read_at(fd: int, nbytes: int, offset: int) -> bytes:
    """Return what a file has at an offset."""
    buffer, done = ctypes.create_string_buffer(nbytes), _D()
    where = _Overlapped(offset=offset)
    if not _ReadFile(_handle(fd), buffer, nbytes, ctypes.byref(done), ctypes.byref(where)):
        if ctypes.get_last_error() == 38:  # the end of the file
            return b""
        raise _failure()
    return buffer.raw[: done.value]


def write_at(fd: int, data: bytes, offset: int) -> None:
    """Write at an offset of a file."""
    done, where = _D(), _Overlapped(offset=offset)
    if not _WriteFile(_handle(fd), data, len(data), ctypes.byref(done), ctypes.byref(where)):
        raise _failure()


def make_sparse(fd: int) -> None:
    """Have a file take no room for what was never written."""
    done = _D()
    if not _DeviceIoControl(_handle(fd), _SET_SPARSE, None, 0, None, 0, ctypes.byref(done), None):
        raise _failure()


def set_size(fd: int, nbytes: int) -> None:
    """Move the end of a file, without writing anything."""
    end = ctypes.c_int64(nbytes)
    if not _SetFileInformation(_handle(fd), _END_OF_FILE_INFO, ctypes.byref(end), 8):
        raise _failure()


def backed(fd: int, offset: int, nbytes: int) -> list[tuple[int, int]] | None:
    """Return what has room on the disk, as (offset, size); None where that can't be told."""
    found: list[tuple[int, int]] = []
    rows, done = (_Span * 256)(), _D()
    end = offset + nbytes
    while offset < end:
        asked = _Span(offset, end - offset)
        good = _DeviceIoControl(
            _handle(fd),
            _QUERY_ALLOCATED_RANGES,
            *(ctypes.byref(asked), ctypes.sizeof(asked), rows, ctypes.sizeof(rows)),
            *(ctypes.byref(done), None),
        )
        if not good and ctypes.get_last_error() != MORE_DATA:
            return None
        count = done.value // ctypes.sizeof(_Span)
        found += [(rows[n].offset, rows[n].nbytes) for n in range(count)]
        if good or not count:
            break
        offset = sum(found[-1])
    return found


def is_removed(fd: int) -> bool:
    """Say whether an open file has no name any more, or is about to lose it."""
    info = _StandardInfo()
    size = ctypes.sizeof(info)
    if not _GetFileInformation(_handle(fd), _STANDARD_INFO, ctypes.byref(info), size):
        raise _failure()
    return bool(info.removed) or info.links == 0


def lock(fd: int) -> bool:
    """Take the lock of a file if it is free."""
    where = _Overlapped(offset=_LOCK_OFFSET)
    if _LockFile(_handle(fd), _LOCK_EXCLUSIVE_NOW, 0, 1, 0, ctypes.byref(where)):
        return True
    if ctypes.get_last_error() == LOCK_VIOLATION:
        return False
    raise _failure()


def unlock(fd: int) -> None:
    """Give the lock of a file back."""
    where = _Overlapped(offset=_LOCK_OFFSET)
    if not _UnlockFile(_handle(fd), 0, 1, 0, ctypes.byref(where)):
        raise _failure()


def drive_type(root: str) -> int:
    """Return what sort of drive that is."""
    return int(_GetDriveType(root))


# ---------------------------------------------------------------------------------- owners


def _text(user: Any) -> str:
    text = ctypes.c_wchar_p()
    if not _text_of_user(user, ctypes.byref(text)):
        raise _failure()
    try:
        return str(text.value)
    finally:
        _LocalFree(text)


def users() -> tuple[str, str]:
    """Return who this process is, and who owns what it makes: their security identifiers."""
    token, nbytes = _H(), _D()
    if not _OpenProcessToken(_THIS_PROCESS, 0x0008, ctypes.byref(token)):
        raise _failure()
    try:
        found = []
        for what in (1, 4):  # TokenUser, TokenOwner
            buffer = ctypes.create_string_buffer(512)
            if not _GetTokenInformation(token, what, buffer, 512, ctypes.byref(nbytes)):
                raise _failure()
            found.append(_text(ctypes.c_void_p.from_buffer(buffer)))
        return found[0], found[1]
    finally:
        _CloseHandle(token)


def owner(path: str) -> str:
    """Return the security identifier of whom a file or folder belongs to."""
    user, descriptor = ctypes.c_void_p(), ctypes.c_void_p()
    error = _GetNamedSecurity(
        path, 1, 1, ctypes.byref(user), None, None, None, ctypes.byref(descriptor)
    )
    if error:
        raise ctypes.WinError(error)
    try:
        return _text(user)
    finally:
        _LocalFree(descriptor)


def make_private_directory(path: str) -> None:
    """Make a folder that only this user, the system and administrators can enter.

    What is made in it inherits that; what the folder above grants to others does not count.
    """
    descriptor = ctypes.c_void_p()
    rights = f"D:P(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)(A;OICI;FA;;;{users()[0]})"
    if not _descriptor_of(rights, 1, ctypes.byref(descriptor), None):
        raise _failure()
    try:
        attributes = _SecurityAttributes(ctypes.sizeof(_SecurityAttributes), descriptor, False)
        if not _CreateDirectory(path, ctypes.byref(attributes)):
            raise _failure()
    finally:
        _LocalFree(descriptor)


# ---------------------------------------------------------------------------------- memory


def protection(address: int) -> tuple[int, int]:
    """Return the protection of a page, and where the pages end that have the same one."""
    region = _Region()
    if not _VirtualQuery(address, ctypes.byref(region), ctypes.sizeof(region)):
        raise _failure()
    return region.protection, region.address + region.nbytes


def working_set(rows: Any) -> None:
    """Fill an array of (address, attributes) in: PSAPI_WORKING_SET_EX_INFORMATION."""
    if not _QueryWorkingSet(_THIS_PROCESS, rows.ctypes.data, rows.nbytes):
        raise _failure()


def trim(address: int, nbytes: int) -> None:
    """Take pages out of the working set: what VirtualUnlock does with pages not locked."""
    _VirtualUnlock(address, nbytes)


# ---------------------------------------------------------------------------------- mutex


class Mutex:
    """A mutex by name, for a ``with`` statement; held by a thread that died, it is had too."""

    def __init__(self, name: str) -> None:
        self._handle = _CreateMutex(None, False, name)
        if not self._handle:
            raise _failure()

    def __enter__(self) -> None:
        if _Wait(self._handle, 10_000) not in (0x00, 0x80):
            raise TimeoutError("a mutex was not had in 10 s")

    def __exit__(self, *args: object) -> None:
        _ReleaseMutex(self._handle)
        _CloseHandle(self._handle)
