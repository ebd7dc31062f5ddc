//! GEMM of bf16 pairs with AMX: computes 32 × 32 elements of C at a time in four tiles, from two
//! tiles of A and two of B.
//!
//! The instructions are written as inline assembly because the intrinsics are not stable. A tile
//! holds 16 rows of 64 bytes.

use super::panel::{NR, OutputTile, Product};

/// Rows and columns of a tile of C.
const TILE: usize = 16;

/// Returns true if the processor has AMX with bf16 and the operating system lets this process use
/// it.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) fn available() -> bool {
    use std::sync::OnceLock;
    static ALLOWED: OnceLock<bool> = OnceLock::new();
    *ALLOWED.get_or_init(|| {
        const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_int = 18;
        // Leaf 7, EDX: bit 22 amx-bf16, bit 24 amx-tile.
        let edx = std::arch::x86_64::__cpuid_count(7, 0).edx;
        let has_amx = edx & (1 << 22) != 0 && edx & (1 << 24) != 0;
        // SAFETY: the call asks for permission to use the tiles and changes nothing else. Threads
        // that start later inherit the permission.
        has_amx
            && unsafe {
                libc::syscall(
                    libc::SYS_arch_prctl,
                    ARCH_REQ_XCOMP_PERM,
                    XFEATURE_XTILEDATA,
                ) == 0
            }
    })
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(super) fn available() -> bool {
    false
}

/// Operand of `ldtilecfg`: configures all eight tiles as 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const fn config() -> TileConfig {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut i = 0;
    while i < 8 {
        row_bytes[i] = 64;
        rows[i] = 16;
        i += 1;
    }
    TileConfig {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes,
        rows,
    }
}

static CONFIG: TileConfig = config();

thread_local! {
    /// True once this thread has configured its tiles. The configuration stays for the thread's
    /// lifetime.
    static CONFIGURED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Computes `m` rows of C, as [`super::kernel::panel_product`] does.
///
/// # Safety
/// As [`super::kernel::panel_product`], with [`super::panel::ROW_PADDING`] readable rows after the
/// last. [`available`] must have returned true.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn panel_product(m: usize, products: &[Product], out: OutputTile) {
    CONFIGURED.with(|done| {
        if !done.replace(true) {
            // SAFETY: AMX is available; nothing else in this process configures tiles.
            unsafe {
                std::arch::asm!(
                    "ldtilecfg [{}]",
                    in(reg) &raw const CONFIG,
                    options(nostack, preserves_flags)
                )
            };
        }
    });
    // SAFETY: guaranteed by the caller. Each thread has its own tiles.
    unsafe {
        for i in (0..m).step_by(2 * TILE) {
            for j in (0..out.columns).step_by(2 * TILE) {
                square((i, j), m, products, out);
            }
        }
    }
}

/// Computes up to 32 × 32 elements of C, starting at `(i, j)`.
///
/// # Safety
/// As [`panel_product`]; the tiles are configured.
#[cfg(target_arch = "x86_64")]
unsafe fn square((i, j): (usize, usize), m: usize, products: &[Product], out: OutputTile) {
    let OutputTile {
        c,
        stride,
        columns: n,
        accumulate,
    } = out;
    let (rows, cols) = ((m - i).min(2 * TILE), (n - j).min(2 * TILE));
    let whole = rows == 2 * TILE && cols == 2 * TILE;
    let mut edge = std::mem::MaybeUninit::<[f32; 4 * TILE * TILE]>::uninit();
    // SAFETY: a full square lies inside C. A partial one is computed in `edge`, and only its part
    // inside C is copied.
    unsafe {
        let corner = c.add(i * stride + j);
        let (to, step) = if whole {
            (corner, stride)
        } else {
            (edge.as_mut_ptr().cast(), 2 * TILE)
        };
        if accumulate && !whole {
            for r in 0..rows {
                std::ptr::copy_nonoverlapping(corner.add(r * stride), to.add(r * step), cols);
            }
        }
        tile_products(
            i,
            j,
            rows > TILE,
            products,
            OutputTile {
                c: to,
                stride: step,
                ..out
            },
        );
        if !whole {
            for r in 0..rows {
                std::ptr::copy_nonoverlapping(to.add(r * step), corner.add(r * stride), cols);
            }
        }
    }
}

/// Computes 32 × 32 elements of C into `out`, or only the upper 16 × 32 if `both` is false.
///
/// # Safety
/// As [`square`]; `out` is valid for these elements.
#[cfg(target_arch = "x86_64")]
unsafe fn tile_products(i: usize, j: usize, both: bool, products: &[Product], out: OutputTile) {
    use std::arch::asm;
    let OutputTile {
        c,
        stride,
        accumulate,
        ..
    } = out;
    let bytes = stride * 4;
    // SAFETY: guaranteed by the caller. Tile registers keep their values between the `asm!` blocks
    // because nothing else on this thread uses them.
    unsafe {
        let lower = c.add(TILE * stride);
        if accumulate {
            asm!(
                "tileloadd tmm0, [{c} + {s}*1]",
                "tileloadd tmm1, [{c} + {s}*1 + 64]",
                c = in(reg) c,
                s = in(reg) bytes,
                options(nostack, readonly)
            );
            if both {
                asm!(
                    "tileloadd tmm2, [{c} + {s}*1]",
                    "tileloadd tmm3, [{c} + {s}*1 + 64]",
                    c = in(reg) lower,
                    s = in(reg) bytes,
                    options(nostack, readonly)
                );
            }
        } else {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nomem, nostack)
            );
        }
        // A is loaded with the non-temporal hint (`t1`), so that the panel stays in the L1 cache.
        for p in products {
            let a = p.a.add(i * p.stride);
            let b = p.b.add(j);
            let (row, panel) = (p.stride * 4, NR * 4);
            let steps = p.depth / TILE;
            if both {
                asm!(
                    "2:",
                    "tileloaddt1 tmm4, [{a0} + {row}*1]",
                    "tileloadd tmm6, [{b} + {panel}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b} + {panel}*1 + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloaddt1 tmm5, [{a1} + {row}*1]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {a0}, 64",
                    "add {a1}, 64",
                    "add {b}, {step}",
                    "dec {n}",
                    "jnz 2b",
                    a0 = inout(reg) a => _,
                    a1 = inout(reg) a.add(TILE * p.stride) => _,
                    b = inout(reg) b => _,
                    n = inout(reg) steps => _,
                    row = in(reg) row,
                    panel = in(reg) panel,
                    step = const TILE * NR * 4,
                    options(nostack, readonly)
                );
            } else {
                asm!(
                    "2:",
                    "tileloaddt1 tmm4, [{a0} + {row}*1]",
                    "tileloadd tmm6, [{b} + {panel}*1]",
                    "tileloadd tmm7, [{b} + {panel}*1 + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {a0}, 64",
                    "add {b}, {step}",
                    "dec {n}",
                    "jnz 2b",
                    a0 = inout(reg) a => _,
                    b = inout(reg) b => _,
                    n = inout(reg) steps => _,
                    row = in(reg) row,
                    panel = in(reg) panel,
                    step = const TILE * NR * 4,
                    options(nostack, readonly)
                );
            }
        }
        asm!(
            "tilestored [{c} + {s}*1], tmm0",
            "tilestored [{c} + {s}*1 + 64], tmm1",
            c = in(reg) c,
            s = in(reg) bytes,
            options(nostack)
        );
        if both {
            asm!(
                "tilestored [{c} + {s}*1], tmm2",
                "tilestored [{c} + {s}*1 + 64], tmm3",
                c = in(reg) lower,
                s = in(reg) bytes,
                options(nostack)
            );
        }
    }
}
