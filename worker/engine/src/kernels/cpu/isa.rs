//! Which instruction set the kernels use: found at run time, so that one binary runs everywhere and is fast where it can be.

use std::fmt;
use std::str::FromStr;

/// An instruction set that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust, whatever the compiler makes of it; also what serves other architectures.
    Portable,
    /// NEON with its dot products of bytes: Arm from about 2018.
    Neon,
    /// AVX2 with FMA and F16C: x86 from about 2013.
    Avx2,
    /// AVX-512 (F, BW, VL, VNNI): Ice Lake, Zen 4 and later.
    Avx512,
    /// AVX-512 with the matrix tiles of AMX (INT8): Sapphire Rapids and later.
    Amx,
}

impl Isa {
    /// All of them, slowest first.
    pub const ALL: [Isa; 5] = [Isa::Portable, Isa::Neon, Isa::Avx2, Isa::Avx512, Isa::Amx];

    /// Whether this processor has it.
    pub fn supported(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.supported()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Isa::Amx => Isa::Avx512.supported() && tiles_granted(),
            _ => false,
        }
    }

    /// The fastest that this processor has, unless the environment variable `STOKER_CPU_ISA` (`portable`, `neon`,
    /// `avx2`, `avx512`, `amx`) names a slower one: for comparisons, and as a way out.
    pub fn best() -> Isa {
        if let Ok(name) = std::env::var("STOKER_CPU_ISA") {
            match name.parse::<Isa>() {
                Ok(isa) if isa.supported() => return isa,
                _ => {
                    tracing::warn!(name, "STOKER_CPU_ISA names no instruction set of this processor; ignored")
                }
            }
        }
        Self::ALL.into_iter().rev().find(|isa| isa.supported()).unwrap_or(Isa::Portable)
    }
}

/// Whether the processor has tiles and their products of bytes, and the system lets this process use them: it has to be
/// asked once, as their registers add 8 KiB to what it keeps of a thread.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn tiles_granted() -> bool {
    use std::arch::x86_64::__cpuid_count;
    // Of Linux's arch/x86/include/uapi/asm/prctl.h, and the number of the tiles' registers among a thread's states.
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    /// AMX-TILE and AMX-INT8 (Intel's manual, volume 2, CPUID, leaf 7, EDX).
    const FEATURES: u32 = 1 << 24 | 1 << 25;
    static GRANTED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *GRANTED.get_or_init(|| {
        // SAFETY: the call reads and writes no memory; an older kernel does not know it and says so.
        __cpuid_count(7, 0).edx & FEATURES == FEATURES
            && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) } == 0
    })
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Portable => "portable",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        })
    }
}

impl FromStr for Isa {
    type Err = ();
    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|isa| isa.to_string() == name).ok_or(())
    }
}
