//! The backends' types, and whether there is a device for them.
//!
//! Both libraries open their drivers at run time, and panic where there is none; so a device is looked for behind
//! `catch_unwind`, once per process.

use std::panic::catch_unwind;
use std::sync::OnceLock;

/// A device for people, or why there is none.
type Found = Result<Device, String>;

/// What is known of a device.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    /// Its name.
    pub name: String,
    /// It is a program on the CPU: right, but slower than the CPU's own kernels.
    #[cfg_attr(not(feature = "wgpu"), allow(dead_code))]
    pub software: bool,
}

/// Looks for a device once; what the driver's library panics with becomes the reason.
fn find(found: &'static OnceLock<Found>, look: fn() -> Device) -> Found {
    let reason = |panic: Box<dyn std::any::Any + Send>| {
        let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
        text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no reason given".into())
    };
    found.get_or_init(|| catch_unwind(look).map_err(reason)).clone()
}

#[cfg(feature = "wgpu")]
pub(crate) mod wgpu {
    //! Vulkan, Metal, DirectX 12.

    use burn_wgpu::graphics::AutoGraphicsApi;
    use burn_wgpu::{WgpuDevice, init_setup};

    use super::*;

    /// The backend.
    pub(crate) type Wgpu = burn_wgpu::Wgpu;

    /// The default device.
    pub(crate) fn device() -> Found {
        static FOUND: OnceLock<Found> = OnceLock::new();
        find(&FOUND, || {
            let setup = init_setup::<AutoGraphicsApi>(&WgpuDevice::DefaultDevice, Default::default());
            let info = setup.adapter.get_info();
            Device { software: format!("{:?}", info.device_type) == "Cpu", name: info.name }
        })
    }
}

#[cfg(feature = "cuda")]
pub(crate) mod cuda {
    //! NVIDIA.

    use burn::tensor::Tensor;
    use burn_cuda::CudaDevice;

    use super::*;

    /// The backend.
    pub(crate) type Cuda = burn_cuda::Cuda;

    /// The first device.
    pub(crate) fn device() -> Found {
        static FOUND: OnceLock<Found> = OnceLock::new();
        find(&FOUND, || {
            let device = CudaDevice::default();
            let ones = Tensor::<Cuda, 1>::ones([2], &device);
            assert_eq!(
                ones.into_data().to_vec::<f32>().unwrap_or_default(),
                [1.0, 1.0],
                "the device does not compute"
            );
            Device { name: format!("{device:?}"), software: false }
        })
    }
}
