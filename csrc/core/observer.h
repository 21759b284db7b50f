// The hooks of testing.h: the observer of launches, and the device that an emulation reports.
#pragma once

#include <dsv4/testing.h>

#include "core/device.h"

namespace dsv4 {

struct Observer {
  dsv4_launch_observer call;  // null: launches are left out
  void* user;
  Device device;  // used only if emulating
  bool emulating;
};

// Null outside tests.
const Observer* observer();

// The emulated device, or null.
inline const Device* emulated_device() {
  const Observer* watching = observer();
  return watching && watching->emulating ? &watching->device : nullptr;
}

}  // namespace dsv4
